"""``python -m ringfx``: the command, where its script is not on the path (torchrun -m ringfx)."""

from ringfx.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
