"""Every kernel of the package: no autograd, no registration, no policy. Installed as `inception_fast.kernels`."""

if __name__ != "inception_fast.kernels":
    raise ImportError(f"import this package as inception_fast.kernels, not as {__name__!r}")
