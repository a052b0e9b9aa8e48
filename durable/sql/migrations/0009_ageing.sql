-- breaking: no
--
-- ageing  seconds after which a runnable row of the queue is given the best priority that waits there. Agents and beats
--         that do not know it leave it to the others.

ALTER TABLE {schema}.queues ADD COLUMN ageing double precision CHECK (ageing > 0);

COMMENT ON COLUMN {schema}.queues.ageing IS 'seconds after which a waiting row joins the best priority that waits; null: never';

INSERT INTO {schema}.duties (name) VALUES ('ageing');
