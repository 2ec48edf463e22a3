"""User functions that were written for slime or miles, called as they are called there.

    function named by a flag -> loading.load: finds its convention -> one adapter of `functions`, `reward` or `evaluation`
                                                                    `- calls it with Sample and args of `sample` and `args`

A function that imports `slime` or `miles` gets the stand-ins of `modules`, unless the real package is installed. Functions that
post to a router themselves reach all engines of the run at the address of `gateway`. Qwench's own convention is the typed one
of `rollout.functions`; nothing outside this package knows the other.
"""
