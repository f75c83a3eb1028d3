"""MLflow's runs and registry, and where a result came from. It may import storage."""
