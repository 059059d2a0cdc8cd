"""Attention on a GPU over slots: one file per kernel library, and the choice between them."""
