"""The program in the middle: rounds, aggregation, hypernetwork, page and API."""
