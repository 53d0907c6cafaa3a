// measure_compilation SECONDS MEGABYTES COMMAND...: runs the command, prints the processor time and the largest memory
// that it and its children took, and fails where one is above its limit. The quickest of up to fifteen runs counts:
// other work on the machine only ever adds to the time.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: measure_compilation SECONDS MEGABYTES COMMAND...\n");
    return 2;
  }
  const double seconds_limit = std::atof(argv[1]), megabytes_limit = std::atof(argv[2]);
  double seconds = 1e9, megabytes = 0;
  for (int run = 0; run < 15 && (run == 0 || seconds > seconds_limit); ++run) {
    const pid_t child = fork();
    if (child < 0) {
      std::perror("fork");
      return 1;
    }
    if (child == 0) {
      execvp(argv[3], argv + 3);
      std::perror(argv[3]);
      _exit(127);
    }
    int status = 0;
    rusage used{};
    if (wait4(child, &status, 0, &used) != child || status != 0) {
      std::fprintf(stderr, "the compiler failed\n");
      return 1;
    }
    const auto in_seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
    };
    seconds = std::min(seconds, in_seconds(used.ru_utime) + in_seconds(used.ru_stime));
    megabytes = std::max(megabytes, static_cast<double>(used.ru_maxrss) / 1024);  // ru_maxrss is in KiB
  }
  std::printf("%.2f s of processor time (limit %.0f), %.0f MiB (limit %.0f)\n", seconds, seconds_limit, megabytes,
              megabytes_limit);
  return seconds <= seconds_limit && megabytes <= megabytes_limit ? 0 : 1;
}
