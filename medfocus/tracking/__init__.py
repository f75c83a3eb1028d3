"""MLflow's runs and model registry, and the origin of a result.

``runs`` writes runs, ``registry`` manages versions of models, ``provenance`` describes code, data and
packages, and ``process`` isolates MLflow within this process. Only this room and ``serving.pyfunc`` import
mlflow. This room may import storage.
"""
