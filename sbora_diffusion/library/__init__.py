"""A folder of concept files and the ledger of their columns."""
