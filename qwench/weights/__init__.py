"""How the trained weights reach the engines that sample with them.

publisher   the one owner: publishes a version to all engines of a run, and again after every engine was restarted
local       alias and copy, to an engine of this process
remote      what every trainer rank does for engines in other processes: plan, send, confirm
routes      the transport of each engine: CUDA IPC, broadcast or disk
broadcast   the process group of rank 0 and the engines on other devices
exchange    messages between the trainer ranks during a publication

A receiver, which sends buckets to one kind of server, belongs to its kind (`engines.kinds`).
"""
