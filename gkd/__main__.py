"""python -m gkd, which launchers use: torchrun --nproc_per_node 2 -m gkd train CONFIG"""

from gkd.cli.main import main

if __name__ == "__main__":
    main()
