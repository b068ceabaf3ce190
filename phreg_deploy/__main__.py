from phreg_deploy.cli import main

main()
