"""The tests of ringfx; a package so that spawned ranks can import test functions by name."""
