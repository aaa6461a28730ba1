"""Operations: one file each, with schema, input check and backends (see `backends.py`)."""
