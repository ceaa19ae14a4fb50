"""What was done to a base model before the job, and how training begins without it."""
