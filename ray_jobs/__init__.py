"""One file per verb, run with `python -m ray_jobs.<verb>`."""
