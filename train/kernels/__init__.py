from train.kernels._select import Kernel as Kernel
from train.kernels._select import select as select
