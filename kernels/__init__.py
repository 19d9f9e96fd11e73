"""The Triton twins of csrc/, installed as fuseopt.kernels: same names, same order of stages."""
