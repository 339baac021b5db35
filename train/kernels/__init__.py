from train.engine import Job as Job
from train.engine import Kernel as Kernel
from train.kernels._select import select as select
