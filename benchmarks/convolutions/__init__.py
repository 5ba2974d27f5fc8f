"""How much less of a sample each rank holds where its rows are cut, and what goes over the network.

python -m benchmarks.convolutions       # into results.jsonl and the table of README.md
"""
