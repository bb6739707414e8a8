"""What NEO is measured with: workloads, benchmarks and their results."""
