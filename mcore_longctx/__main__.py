"""`python -m mcore_longctx` is the command `mcore-longctx`."""

from mcore_longctx.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
