"""Reads out of the built runtimes what their programs accept, into the tables that experiments are checked against."""
