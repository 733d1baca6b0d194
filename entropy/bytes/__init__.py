"""Lossless coding of bytes: context mixing (``mixing``, ``binary``), blocks of a file (``blocks``), text (``language``)."""
