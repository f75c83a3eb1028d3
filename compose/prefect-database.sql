-- Run once, when the volume is new; PostgreSQL's image makes the database of MLflow by itself.
CREATE DATABASE prefect;
