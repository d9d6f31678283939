def main(*, once, directory):
    return 0
