"""MLflow's, Prefect's and PostgreSQL's servers. It may import medfocus."""
