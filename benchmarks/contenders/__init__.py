"""What `versus_trl.py` runs in processes of their own: `python -m contenders JOB.json`, one module a role."""
