# Compiles SOURCE with COMPILER (syntax only) and judges it by its first lines:
#
#   // expect: TEXT      it must not compile, and the messages must hold TEXT; several such lines must all be found
#   // compiles          it must compile (the control: the compiler and the include folders work)
#
# A case that names CALM_CORRECTED is compiled a second time with this macro defined and must then compile, which shows
# that nothing but the mistake stops it.
function(compile result_variable output_variable)
  set(flags)
  foreach(include IN LISTS INCLUDES)
    list(APPEND flags -I${include})
  endforeach()
  execute_process(
    COMMAND ${COMPILER} -std=c++20 -fsyntax-only ${flags} ${ARGN} ${SOURCE}
    RESULT_VARIABLE result
    OUTPUT_VARIABLE output
    ERROR_VARIABLE output)
  set(${result_variable} "${result}" PARENT_SCOPE)
  set(${output_variable} "${output}" PARENT_SCOPE)
endfunction()

set(ENV{LC_ALL} C)
file(READ ${SOURCE} text)
string(REGEX MATCHALL "// expect: [^\n]+" expectations "${text}")
string(FIND "${text}" "// compiles\n" control)

compile(result output)
if(control EQUAL 0)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${SOURCE} must compile, but:\n${output}")
  endif()
  return()
endif()

if(NOT expectations)
  message(FATAL_ERROR "${SOURCE} does not begin with '// expect: TEXT' or '// compiles'")
endif()
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles, but must not")
endif()
foreach(expectation IN LISTS expectations)
  string(SUBSTRING "${expectation}" 11 -1 expectation)
  string(FIND "${output}" "${expectation}" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "${SOURCE} does not compile, as it should, but the messages lack\n  ${expectation}\n${output}")
  endif()
endforeach()

string(FIND "${text}" "CALM_CORRECTED" position)
if(NOT position EQUAL -1)
  compile(result output -DCALM_CORRECTED)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${SOURCE} must compile once it is corrected, but:\n${output}")
  endif()
endif()
