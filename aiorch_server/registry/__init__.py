"""The durable record: models, versions, what should run, who may do what, and what was done."""
