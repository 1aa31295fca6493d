"""The bundled demo model: what it knows, how it was trained, and where its files are."""
