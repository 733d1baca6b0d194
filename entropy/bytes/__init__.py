"""Lossless coding of bytes: context mixing (``mixing``, ``binary``), its blocks (``blocks``), and text with a language model."""
