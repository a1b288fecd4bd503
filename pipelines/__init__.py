"""The jobs, on one machine or many: everything that knows Ray, and the command line."""
