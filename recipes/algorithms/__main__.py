from kernels.host.command import interruptible
from recipes.algorithms.command import main

if __name__ == "__main__":
    with interruptible():
        main()
