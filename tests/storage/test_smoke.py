from durable import Durable


def test_an_instance_is_inserted_and_read_back(app: Durable) -> None:
    @app.task(name="add")
    def add(a: int, b: int) -> int:
        return a + b

    result = add.delay(1, 2)

    assert result.status == "runnable"
    assert not result.ready()
