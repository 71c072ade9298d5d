"""What gkd's figures come from, run in a checkout: `python -m benchmarks.<trade>.<name>`.

losses   kernels and ops against their peers
runs     whole steps and runs, against TRL and against the plan
figures  README and docs, held against the files of results/

The comparison of ways to distil is part of the package: `gkd bench table`.
"""

from gkd.environment import prepare_process

prepare_process()  # its settings are those of a gkd process, and are read while torch loads
