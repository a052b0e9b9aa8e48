"""Workers and beats: the processes that run what producers enqueue. Start reading at supervisor.py."""
