"""The flags of XLA that compile the tests' programs fastest, for this process and those that the tests start.

Most of the tests' time is compiling. Half of it is the backend's optimisation, and half of the rest is what the newer
fusion emitters of XLA for CPUs add; a program in one piece costs less than in several, as each core has a test of its
own. A test of what XLA makes of a program by default gives the flags itself.
"""

FLAGS = " ".join([
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
])  # fmt: skip
