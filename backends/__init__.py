"""Backends: what turns a converted graph into a program; see README.md here."""
