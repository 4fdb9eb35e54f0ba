"""Networks of the CIFAR-100 tables in distillation papers. Parameter counts and outputs equal those of RepDistiller."""
