"""Chaos: a fleet at work on a server of its own, faults drawn from a seed, and a checker that decides the invariants.

application  the tasks and machines of the load, and what each must end as      (tests.chaos.model)
hostile      tasks and machines that harm their process, and what each must end as all the same
client       a producer process: inserts, signals, cancels, and its log of what it was promised
cluster      the server under test, and the processes of the fleet
proxy        delays, cuts and half-opens connections, and swallows answers
recorder     the database's own history: logical decoding, in commit order
faults       what is done to processes; surroundings: to the server, its disk, the network, the clocks
guilty       faults that are instances of the hostile ones; foreign: transactions of strangers
table        all of them; nemesis: when which one is made
record       what the checker reads;  rules, history_rules, harm_rules: what it decides
run          one seed from beginning to end                                     <- START HERE

`python -m tests.chaos --help`; docs/reliability.md says what it promises.
"""
