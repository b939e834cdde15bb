"""Batch jobs: a file of requests in, a file of results and a file of errors out."""
