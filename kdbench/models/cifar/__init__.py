"""The networks of the CIFAR-100 tables: parameter counts and outputs equal those of RepDistiller."""
