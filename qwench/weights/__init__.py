"""How the trained weights reach the engines that sample with them.

publish           brings a version to all engines of a run: those of this process by `transports`, others by `rank_publication`
transports        alias and copy, inside one process
rank_publication  what every trainer rank does for engines in other processes: plan, send, confirm
    routes        which way each engine is reached: CUDA IPC, broadcast, disk
    ipc_sender    buckets that engines on the same device open; broadcast: the group with engines elsewhere
    buffer_ring   where buckets lie meanwhile
    receivers     an engine as its sender sees it, and `checks`, what it must hold afterwards; SGLang's are in `sglang`
buckets           weights in portions; quantize: in FP8
"""
