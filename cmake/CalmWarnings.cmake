# calm_dev_options: what calm's own programs are compiled with. Nothing of it reaches a project that uses calm.
add_library(calm_dev_options INTERFACE)
target_compile_options(
  calm_dev_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion
                             $<$<BOOL:${CALM_WARNINGS_AS_ERRORS}>:-Werror>)
# g++ 12 finds uninitialised values in its own AVX-512 headers, and overlapping copies in std::string, where there are none.
target_compile_options(
  calm_dev_options INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized> $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
                             $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>)

if(CALM_NATIVE)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native CALM_HAS_MARCH_NATIVE)
  if(CALM_HAS_MARCH_NATIVE)
    target_compile_options(calm_dev_options INTERFACE -march=native)
  endif()
endif()

# calm_add_program(NAME file...): one of our own programs.
function(calm_add_program name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE calm::io calm_dev_options)
  if(TARGET calm::onednn)
    target_link_libraries(${name} PRIVATE calm::onednn)
  endif()
endfunction()
