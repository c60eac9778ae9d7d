"""ModelsLab's HTTP contract without HTTP: requests, responses, errors and sentences."""
