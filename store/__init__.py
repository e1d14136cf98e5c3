"""The database: schema, writes, spool and image files. Never imports ray."""
