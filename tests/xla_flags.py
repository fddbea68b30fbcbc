"""Flags for XLA, in a file of their own: `helpers` makes a folder where it is imported, a new one for each worker."""

SOONER = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # XLA compiles in half the time
