"""Networks of the CIFAR-100 distillation tables; parameter counts and outputs equal those of RepDistiller."""
