// measure_compilation SECONDS MEGABYTES REFERENCE_SECONDS REFERENCE SOURCE COMMAND...: compiles the two sources with
// the command, prints the processor time and the largest memory that SOURCE took, and fails where one is above its
// limit.
//
// Where the machine is slower just now than one that compiles the reference in REFERENCE_SECONDS, SECONDS are those of
// that machine: the same compilation takes a third more or less from one minute to the next on a machine that is
// shared, and without the reference the test would tell how busy it is. The quickest of five to fifteen runs of each
// counts, in turn: other work only ever adds to the time.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

struct Cost {
  double seconds = 1e9, megabytes = 0;
};

/// Runs the command for `source` once more and keeps the shortest time and the largest memory.
bool compile(std::vector<char*> command, char* source, Cost& cost) {
  command.push_back(source);
  command.push_back(nullptr);
  const pid_t child = fork();
  if (child < 0) {
    std::perror("fork");
    return false;
  }
  if (child == 0) {
    execvp(command.front(), command.data());
    std::perror(command.front());
    _exit(127);
  }
  int status = 0;
  rusage used{};
  if (wait4(child, &status, 0, &used) != child || status != 0) {
    std::fprintf(stderr, "the compiler failed on %s\n", source);
    return false;
  }
  const auto in_seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  cost.seconds = std::min(cost.seconds, in_seconds(used.ru_utime) + in_seconds(used.ru_stime));
  cost.megabytes = std::max(cost.megabytes, static_cast<double>(used.ru_maxrss) / 1024);  // ru_maxrss is in KiB
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::fprintf(stderr,
                 "usage: measure_compilation SECONDS MEGABYTES REFERENCE_SECONDS REFERENCE SOURCE COMMAND...\n");
    return 2;
  }
  const double seconds_limit = std::atof(argv[1]), megabytes_limit = std::atof(argv[2]);
  const double reference_seconds = std::atof(argv[3]);
  const std::vector<char*> command(argv + 6, argv + argc);
  Cost reference, source;
  double seconds = 1e9;
  for (int run = 0; run < 15 && (run < 5 || seconds > seconds_limit); ++run) {
    if (!compile(command, argv[4], reference) || !compile(command, argv[5], source)) return 1;
    seconds = std::min(source.seconds, source.seconds / reference.seconds * reference_seconds);
  }
  std::printf(
      "%.2f s of processor time (limit %.0f) where the reference takes at most %.2f s; here %.2f s and %.2f s; "
      "%.0f MiB (limit %.0f)\n",
      seconds, seconds_limit, reference_seconds, source.seconds, reference.seconds, source.megabytes, megabytes_limit);
  return seconds <= seconds_limit && source.megabytes <= megabytes_limit ? 0 : 1;
}
