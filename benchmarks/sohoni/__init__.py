"""WRN-28-2 on CIFAR-10 in less and less memory: the table of Sohoni et al., measured."""
