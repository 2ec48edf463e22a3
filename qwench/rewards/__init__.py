r"""From a response and a label to a verdict: a score and the reason for it.

    response, label --read--> Verdict                      (most: in this process, in microseconds)
                    \-------> Question --worker--> Verdict (needs algebra: in a process that is killed at its deadline)

Nothing here imports torch: the workers must start fast.
"""
