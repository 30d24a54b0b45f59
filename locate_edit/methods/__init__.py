"""Edit methods, one a file. Each is a frozen dataclass of hyperparameters whose call changes a `Run`."""
