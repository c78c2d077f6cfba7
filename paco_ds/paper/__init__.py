"""The paper: its equations, its tables, and runs that reproduce them."""
